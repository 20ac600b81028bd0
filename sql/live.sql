-- What `live` asks each second.


-- name: state
-- Whether the collection is as it was when it was opened, when it was last scanned, and whether there is work that does not
-- wait for its next try. Parameters: collection, longest (the longest wait of a batch).

SELECT
    collection.fingerprint, collection.epoch::text, collection.definition_hash,
    EXISTS (
        SELECT FROM {item} AS item
        JOIN embeddings.batch ON batch.collection = collection.name AND batch.batch = item.batch
        WHERE item.seen_hash IS DISTINCT FROM item.committed_hash
          AND NOT coalesce(batch.next_try > now() AND batch.next_try <= now() + %(longest)s::interval, false)),
    extract(epoch FROM now() - scan.full_scan_at)::double precision
FROM embeddings.collection
LEFT JOIN embeddings.scan ON scan.collection = collection.name AND scan.full_scan_at <= now()
WHERE collection.name = %(collection)s


-- name: files
-- The lake's files that count of a batch, of any model. Parameters: collection, batches.

SELECT DISTINCT file FROM embeddings.backfill
WHERE collection = %(collection)s AND batch = ANY (%(batches)s::bigint[]) AND file IS NOT NULL
