"""From documents to device batches: tokenizer, token shards, order, loader."""
