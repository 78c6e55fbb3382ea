"""From documents to batches on the device: tokenizer, token shards, data order, loader."""
