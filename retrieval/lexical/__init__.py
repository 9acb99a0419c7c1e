"""Search by words: tokens, product records, BM25 and TF-IDF, and rank fusion."""
