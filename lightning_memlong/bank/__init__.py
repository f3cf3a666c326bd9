"""What is remembered of a document: keys and values, embeddings, counters, eviction."""
