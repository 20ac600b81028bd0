-- A row whose text went, or became another, loses its vector, but for one that this landing writes anyway.
-- replaced: whether it writes this model's.

WITH forgotten AS (
    DELETE FROM {hash} AS hash USING landing_gone AS gone WHERE hash.text_id = gone.id RETURNING {hash_keys}
), coming AS MATERIALIZED (
    SELECT {typed_keys}
    FROM landing_vector
    JOIN landing_text AS made USING (row_number)
    JOIN landing_decision AS decided ON decided.item_key = made.item_key AND decided.decision = 'land',
         jsonb_populate_record(NULL::{hash}, {key_json}) AS typed
    WHERE {replaced}
), emptied AS (
    UPDATE {target} AS target SET {column} = NULL
    FROM forgotten AS hash
    WHERE {same_row} AND target.{column} IS NOT NULL AND ({hash_keys}) NOT IN (SELECT {keys} FROM coming)
)
SELECT count(*) FROM forgotten
