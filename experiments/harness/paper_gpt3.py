"""Results of Hu et al. 2021 (arXiv 2106.09685v2) on GPT-3 175B: Tables 5, 6, 15 and 16.

Validation accuracy in percent, of WikiSQL's logical form and of MNLI's matched part; it fluctuates
by 0.5 and 0.1 (0.3 in Table 16). No public weights are of this model.
"""

Table = tuple[tuple[str, ...], ...]  # the first row is the header

TABLE_5: Table = (
  ("", "Wq, r 8", "Wk, r 8", "Wv, r 8", "Wo, r 8", "Wq Wk, r 4", "Wq Wv, r 4", "all, r 2"),
  ("WikiSQL", "70.4", "70.0", "73.0", "73.2", "71.4", "73.7", "73.7"),
  ("MNLI", "91.0", "90.8", "91.0", "91.3", "91.3", "91.3", "91.7"),
)
TABLE_6: Table = (
  ("", "r 1", "r 2", "r 4", "r 8", "r 64"),
  ("WikiSQL, Wq", "68.8", "69.6", "70.5", "70.4", "70.0"),
  ("WikiSQL, Wq Wv", "73.4", "73.3", "73.7", "73.8", "73.5"),
  ("WikiSQL, Wq Wk Wv Wo", "74.1", "73.7", "74.0", "74.0", "73.9"),
  ("MNLI, Wq", "90.7", "90.9", "91.1", "90.7", "90.7"),
  ("MNLI, Wq Wv", "91.3", "91.4", "91.3", "91.6", "91.4"),
  ("MNLI, Wq Wk Wv Wo", "91.2", "91.7", "91.7", "91.5", "91.4"),
)
TABLE_15: Table = (  # the points of Figure 2
  ("method", "trained", "WikiSQL", "MNLI"),
  ("full fine-tuning", "175B", "73.8", "89.5"),
  ("PreEmbed, 32 + 8 tokens", "0.4M", "55.9", "84.9"),
  ("PreEmbed, 64 + 8", "0.9M", "58.7", "88.1"),
  ("PreEmbed, 128 + 8", "1.7M", "60.6", "88.0"),
  ("PreEmbed, 256 + 8", "3.2M", "63.1", "88.6"),
  ("PreEmbed, 512 + 8", "6.4M", "55.9", "85.8"),
  ("PreLayer, 2 + 2", "5.1M", "68.5", "89.2"),
  ("PreLayer, 8 + 0", "10.1M", "69.8", "88.2"),
  ("PreLayer, 8 + 8", "20.2M", "70.1", "89.5"),
  ("PreLayer, 32 + 4", "44.1M", "66.4", "89.6"),
  ("PreLayer, 64 + 0", "76.1M", "64.9", "87.9"),
  ("Adapter_H, r 1", "7.1M", "71.9", "89.8"),
  ("Adapter_H, r 4", "21.2M", "73.2", "91.0"),
  ("Adapter_H, r 8", "40.1M", "73.2", "91.5"),
  ("Adapter_H, r 16", "77.9M", "73.2", "91.5"),
  ("Adapter_H, r 64", "304.4M", "72.6", "91.5"),
  ("LoRA, Wv, r 2", "4.7M", "73.4", "91.7"),
  ("LoRA, Wq Wv, r 1", "4.7M", "73.4", "91.3"),
  ("LoRA, Wq Wv, r 2", "9.4M", "73.3", "91.4"),
  ("LoRA, all, r 1", "9.4M", "74.1", "91.2"),
  ("LoRA, Wq Wv, r 4", "18.8M", "73.7", "91.3"),
  ("LoRA, all, r 2", "18.8M", "73.7", "91.7"),
  ("LoRA, Wq Wv, r 8", "37.7M", "73.8", "91.6"),
  ("LoRA, all, r 4", "37.7M", "74.0", "91.7"),
  ("LoRA, Wq Wv, r 64", "301.9M", "73.6", "91.4"),
  ("LoRA, all, r 64", "603.8M", "73.9", "91.4"),
  ("LoRA + PreEmbed, r 8, 8 + 4", "37.8M", "75.0", "91.4"),
  ("LoRA + PreEmbed, r 32, 8 + 4", "151.1M", "75.9", "91.1"),
  ("LoRA + PreEmbed, r 64, 8 + 4", "302.1M", "76.2", "91.3"),
  ("LoRA + PreLayer, r 8, 8 + 4", "52.8M", "72.9", "90.2"),
)
TABLE_16: Table = (
  ("MNLI", "100 examples", "1,000", "10,000", "392,000"),
  ("full fine-tuning", "60.2", "85.8", "88.9", "89.5"),
  ("PreEmbed", "37.6", "75.2", "79.5", "88.6"),
  ("PreLayer", "48.3", "82.5", "85.9", "89.6"),
  ("LoRA", "63.8", "85.6", "89.2", "91.7"),
)
