-- What a model lacks, from the data itself: texts, those without a vector, and those of them that quarantine excuses.
-- A batch that a landing has marked meanwhile is not counted among what lacks: it is filled before the swap.
-- Parameters: collection, fingerprint.

SELECT
    count(*),
    count(*) FILTER (WHERE (vector.text_id IS NULL OR vector.content_hash <> text.content_hash)
                       AND fill.complete IS NOT FALSE),
    count(*) FILTER (WHERE vector.text_id IS NULL AND quarantine.content_hash IS NOT NULL
                       AND fill.complete IS NOT FALSE)
FROM {text} AS text
JOIN {item} AS item USING (item_key)
LEFT JOIN embeddings.fill
  ON fill.collection = %(collection)s AND fill.fingerprint = %(fingerprint)s AND fill.batch = item.batch
LEFT JOIN {written} AS vector ON vector.text_id = text.id
LEFT JOIN embeddings.quarantine
  ON quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
 AND quarantine.content_hash = text.content_hash
WHERE NOT text.blank
