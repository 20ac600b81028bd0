"""ANN indexes over a model table: FAISS generations on disk, and pgvector's indexes in the database."""
