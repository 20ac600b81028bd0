-- How many contents are to be encoded, equal ones of a batch once, and a sample of them. {lacking}: which texts have no
-- vector. Parameter: sample.

WITH wanted AS MATERIALIZED (
    SELECT item.batch, text.text
    FROM {text} AS text
    JOIN {item} AS item USING (item_key)
    WHERE NOT text.blank AND {lacking}
)
SELECT
    (SELECT count(*) FROM (SELECT DISTINCT batch, text FROM wanted) AS encoded),
    (SELECT array_agg(text) FROM (SELECT text FROM wanted ORDER BY random() LIMIT %(sample)s) AS sampled)
