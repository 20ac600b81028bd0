-- The batches with a text whose time in quarantine is over and that has no vector yet, and how many such items.
-- Parameters: collection, fingerprint, attempts, and due: without the batches that wait for their next try.

SELECT item.batch, count(DISTINCT item.item_key)
FROM embeddings.quarantine
JOIN {text} AS text ON text.content_hash = quarantine.content_hash AND NOT text.blank
JOIN {item} AS item USING (item_key)
JOIN embeddings.batch ON batch.collection = quarantine.collection AND batch.batch = item.batch
WHERE quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
  AND quarantine.attempts < %(attempts)s AND quarantine.next_try <= now()
  AND NOT (%(due)s AND coalesce(batch.next_try > now(), false))
  AND NOT EXISTS (SELECT FROM {written} AS vector WHERE vector.text_id = text.id)
GROUP BY item.batch
ORDER BY item.batch
