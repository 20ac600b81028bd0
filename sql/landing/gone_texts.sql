-- Texts that are no longer expected: of deleted items, and those that the run rendered otherwise or not at all.

WITH gone AS (
    DELETE FROM {text} AS text
    USING landing_decision AS decided
    WHERE text.item_key = decided.item_key
      AND (decided.decision = 'delete'
           OR decided.decision = 'land' AND NOT EXISTS (
               SELECT FROM landing_text AS expected
               WHERE expected.item_key = text.item_key AND expected.vector_name = text.vector_name
                 AND expected.chunk = text.chunk AND expected.content_hash = text.content_hash))
    RETURNING text.id, text.item_key
), remembered AS (
    INSERT INTO landing_gone SELECT id FROM gone
)
SELECT DISTINCT item_key FROM gone
