"""Quantized weights of a frozen base model: codes and scales, dequantized where they are used."""
