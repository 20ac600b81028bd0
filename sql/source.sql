-- One row an item: its key as text (NULL where any key column is), and as JSON texts the columns that it is hashed and
-- rendered by, and those of its payload. relation: the user's table or query. condition: the collection's `where:`, in
-- a scope of its own, and which keys are asked for. LATERAL is a quarter faster here than a subselect a row.

SELECT
    {key} AS item_key,
    row_to_json(seen.*)::text AS row_json,
    row_to_json(payload.*)::text AS payload_json
FROM (SELECT {used} FROM {relation} AS source WHERE {condition}) AS source,
    LATERAL (SELECT {seen}) AS seen,
    LATERAL (SELECT {payload}) AS payload
