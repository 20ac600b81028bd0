-- In which order many rows are written: a layer takes about one of each page, where the next one finds the room of its
-- former version free again. So most updates stay in their page, and no index gets a new entry.

CREATE TEMPORARY TABLE fill_layer AS
WITH placed AS MATERIALIZED (
    SELECT staged.text_id, (target.ctid::text::point)[0] AS page, (target.ctid::text::point)[1] AS line
    FROM fill_vector AS staged
    JOIN {text} AS made ON made.id = staged.text_id,
         jsonb_populate_record(NULL::{hash}, {key_json}) AS typed
    JOIN {target} AS target ON {same_as_typed}
), size AS (
    SELECT greatest(200, least(1000, count(DISTINCT page))) AS rows FROM placed
)
SELECT text_id, (row_number() OVER (ORDER BY line, page) - 1) / size.rows AS layer FROM placed, size;
CREATE INDEX ON fill_layer (layer)
