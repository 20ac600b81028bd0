-- The tables were made anew: ids may come again, so no older FAISS generation counts. Parameter: collection.

UPDATE embeddings.collection SET epoch = gen_random_uuid(), version = version + 1 WHERE name = %(collection)s
