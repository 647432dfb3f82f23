"""Parts of the comparison of variants, `experiments.variants`."""
