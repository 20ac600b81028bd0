-- How many contents are to be encoded, and a sample of them. {lacking}: which texts have no vector. Parameter: sample.

WITH wanted AS MATERIALIZED (SELECT text.text FROM {text} AS text WHERE NOT text.blank AND {lacking})
SELECT
    (SELECT count(DISTINCT text) FROM wanted),
    (SELECT array_agg(text) FROM (SELECT text FROM wanted ORDER BY random() LIMIT %(sample)s) AS sampled)
