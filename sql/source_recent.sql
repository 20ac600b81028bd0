-- Rows in the order in which they were updated: key, the columns that are hashed as JSON, when, whether the row meets
-- the collection's `where:`, and whether its time is ahead of the source's clock. condition: after which position.

SELECT
    {key} AS item_key,
    row_to_json(seen.*)::text AS row_json,
    {updated_at}::text AS updated_at,
    source."row meets where" AS meets,
    {updated_at} > {clock} AS ahead
FROM (
        SELECT {used}, ({meets} IS TRUE) AS "row meets where"
        FROM {relation} AS source
        WHERE {condition} AND {updated_at} IS NOT NULL AND (({meets} IS TRUE) OR {key} IS NOT NULL)
        ORDER BY {updated_at}, {key} COLLATE "C"
        LIMIT {limit}
    ) AS source,
    LATERAL (SELECT {seen}) AS seen
ORDER BY {updated_at}, {key} COLLATE "C"
