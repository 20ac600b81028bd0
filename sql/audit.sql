-- Every copy compared with the next.
-- Placeholders: {item} and {text}, the collection's tables; {written}, the relation that says which texts have their
-- vector under the current model; {lacking}, the view of those that lack it.


-- name: count
-- How ledger, texts and model table disagree, whatever is dirty. Parameter: collection.

SELECT
    (SELECT count(*) FROM {item} AS item
     WHERE item.committed_hash IS NOT NULL
       AND item.item_key NOT IN (SELECT item_key FROM embeddings.quarantined_item WHERE collection = %(collection)s)
       AND NOT EXISTS (SELECT FROM {text} AS text WHERE text.item_key = item.item_key)) AS items_without_texts,
    (SELECT count(*) FROM {text} AS text
     WHERE NOT EXISTS (SELECT FROM {item} AS item WHERE item.item_key = text.item_key)) AS texts_without_item,
    (SELECT count(*)
     FROM {lacking} AS lacking
     JOIN {item} AS item ON item.item_key = lacking.item_key AND item.committed_hash IS NOT NULL
     WHERE NOT lacking.stale AND NOT lacking.excused) AS texts_without_vector,
    (SELECT count(*) FROM {written} AS vector
     WHERE NOT EXISTS (SELECT FROM {text} AS text WHERE text.id = vector.text_id)) AS vectors_without_text,
    (SELECT count(*) FROM {written} AS vector
     JOIN {text} AS text ON text.id = vector.text_id
     WHERE vector.content_hash <> text.content_hash) AS vectors_of_another_text


-- name: hashes_of_batch
-- The content hashes of a batch's vectors. Parameter: batch.

SELECT vector.content_hash
FROM {item} AS item
JOIN {text} AS text USING (item_key)
JOIN {written} AS vector ON vector.text_id = text.id
WHERE item.batch = %(batch)s


-- name: index_again
-- Has the FAISS index built again, which is behind by so many versions then. Parameters: collection, versions.

UPDATE embeddings.collection SET version = version + %(versions)s WHERE name = %(collection)s


-- name: committed_file
-- The file of a batch that committed. Parameters: collection, fingerprint, batch.

SELECT file FROM embeddings.backfill
WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s AND batch = %(batch)s


-- name: committed_files
-- The batches that are committed, and the file of theirs in the lake. Parameters: collection, fingerprint.

SELECT batch, file FROM embeddings.backfill
WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s AND file IS NOT NULL
ORDER BY batch


-- name: render_again
-- Has batches done anew from their rows on; vectors that are in the table are used again. Parameters: collection, batches.

UPDATE embeddings.batch
SET definition_hash = NULL
WHERE collection = %(collection)s AND batch = ANY (%(batches)s::bigint[])
