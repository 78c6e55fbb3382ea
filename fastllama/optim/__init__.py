"""The optimizer: AdamW, clipping and skipping, the learning-rate schedule, spike detection."""
