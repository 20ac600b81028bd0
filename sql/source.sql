-- The user's table or query, only ever read. {relation}: that; {key}: the item key as an expression; {used}, {seen},
-- {payload}: its columns that are read, that are hashed, and that searches return; {condition}: which rows;
-- {updated_at}, {clock}, {row_json}, {meets}, {overlap}, {limit}: of incremental scans; {column}, {columns}, {digests},
-- {low}, {high}, {hash}, {told}, {written}, {arrays}: of rows whose keys cannot be had, or are looked up.


-- name: rows
-- One row an item: its key as text (NULL if any key column is), and as JSON texts the columns that it is hashed and
-- rendered by, and those of its payload. relation: the user's table or query. condition: the collection's `where:`, in
-- a scope of its own, and which keys are asked for. LATERAL is a quarter faster here than a subselect a row.

SELECT
    {key} AS item_key,
    row_to_json(seen.*)::text AS row_json,
    row_to_json(payload.*)::text AS payload_json
FROM (SELECT {used} FROM {relation} AS source WHERE {condition}) AS source,
    LATERAL (SELECT {seen}) AS seen,
    LATERAL (SELECT {payload}) AS payload


-- name: keys
-- The key of each row that meets a condition, and of one whose key is NULL its columns. column: the key, or another
-- expression of it. No other column is asked for: PostgreSQL leaves it out, and what fails for it.

SELECT {column}, CASE WHEN {key} IS NULL THEN (SELECT row_to_json(parts.*)::text FROM (SELECT {columns}) AS parts) ELSE '' END
FROM {relation} AS source
WHERE ({condition}
)


-- name: item_keys
-- The item keys that rows with these values in their key columns have. arrays: one for each of the key's columns.

SELECT {key}, '' FROM unnest({arrays}) AS source ({columns})


-- name: key_digest
-- A key's SHA-256, also of a key whose bytes are no text.

encode(sha256(convert_to({key}, getdatabaseencoding())), 'hex')


-- name: have_keys
-- A condition: the key is one of those with these digests.

encode(sha256(convert_to({key}, getdatabaseencoding())), 'hex') = ANY ({digests}::text[])


-- name: key_range
-- A condition: the hash of the key is in a range.

hashtext({key}) BETWEEN {low} AND {high}


-- name: tell_key
-- A condition that raises an error with a key of this hash that is not among those told. It is asked of a row before a
-- view's volatile functions are, unless the view is a security barrier or has a LIMIT.

CASE WHEN hashtext({key}) = {hash} AND encode(convert_to({key}, getdatabaseencoding()), 'hex') <> ALL ({told}::text[])
     THEN CAST('the key ' || encode(convert_to({key}, getdatabaseencoding()), 'hex') || ' hides' AS integer) IS NULL END


-- name: decoded
-- The text of a key from its bytes in hexadecimal.

SELECT convert_from(decode({written}, 'hex'), getdatabaseencoding()), ''


-- name: newest
-- Where the newest row stands, less an overlap; rows whose time is ahead of the source's clock do not count.

SELECT ({updated_at} - {overlap}::interval)::text
FROM {relation} AS source
WHERE {condition} AND {updated_at} <= {clock} AND isfinite({updated_at})
ORDER BY {updated_at} DESC
LIMIT 1


-- name: updated
-- Rows in the order in which they were updated: key, the columns that are hashed as JSON, when, whether the row meets
-- the collection's `where:`, and whether its time is ahead of the source's clock. condition: after which position.

SELECT
    {key} AS item_key,
    {row_json} AS row_json,
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


-- name: tables
-- Tables and views that a collection may name, as `source.table:` writes them.

SELECT CASE WHEN pg_table_is_visible(pg_class.oid) THEN relname ELSE nspname || '.' || relname END
FROM pg_class
JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE relkind IN ('r', 'v', 'm', 'f', 'p') AND nspname NOT IN ('pg_catalog', 'information_schema', 'embeddings')
  AND nspname NOT LIKE 'pg\_%'
