-- One row an item: key as text (NULL where any key column is), template columns and payload as JSON texts.
-- {relation}: the user's table or (query); {condition}: the collection's `where:`, and which keys are asked for.

SELECT
    {key} AS item_key,
    (SELECT row_to_json(picked) FROM (SELECT {template_columns}) AS picked)::text AS template_json,
    (SELECT row_to_json(picked) FROM (SELECT {payload_columns}) AS picked)::text AS payload_json
FROM {relation} AS source
WHERE {condition}
