"""The indexes over a model table: FAISS generations on disk, pgvector's in the database, and exact search.

It reads model tables and builds what searches use; pipeline, health, search and model changes call it.
"""
