-- Has the FAISS index built again: whatever has a version is behind. Parameter: collection.

UPDATE embeddings.collection SET version = version + 1 WHERE name = %(collection)s
