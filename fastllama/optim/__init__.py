"""The optimizer: AdamW, the learning-rate schedule, spike detection."""
