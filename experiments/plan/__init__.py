"""Plans: train steps compiled for devices that are not here."""
