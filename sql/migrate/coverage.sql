-- What a model lacks, from the data itself: texts, those without a vector, and those of them that quarantine excuses.
-- Parameters: collection, fingerprint.

SELECT
    count(*),
    count(*) FILTER (WHERE vector.text_id IS NULL OR vector.content_hash <> text.content_hash),
    count(*) FILTER (WHERE vector.text_id IS NULL AND quarantine.content_hash IS NOT NULL)
FROM {text} AS text
LEFT JOIN {written} AS vector ON vector.text_id = text.id
LEFT JOIN embeddings.quarantine
  ON quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
 AND quarantine.content_hash = text.content_hash
WHERE NOT text.blank
