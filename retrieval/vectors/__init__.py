"""Where vectors come from: files, embeddings folders, and the checks in front of FAISS."""
