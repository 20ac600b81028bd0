"""The indexes over a model table: FAISS generations on disk, pgvector's in the database, and exact search.

It reads model tables and knows no collection's definition; every room above may call it.
"""
