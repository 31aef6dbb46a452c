"""Where images come from: drawing and preparing shards, the sample order, the cache, decoding, unpaired batches."""
