-- A column that vectors are to be kept in, as it is. No row: no such table. Parameters: table, column, keys.

SELECT
    class.relkind = 'r' AND NOT class.relispartition
      AND NOT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = class.oid) AS is_table,
    pg_has_role(class.relowner, 'USAGE')                                  AS is_owner,
    has_table_privilege(class.oid, 'SELECT') AND has_table_privilege(class.oid, 'UPDATE') AS may_write,
    attribute.attacl IS NOT NULL                                          AS has_grants,
    type.typname                                                          AS type,
    attribute.atttypmod                                                   AS dimension,
    attribute.attnotnull                                                  AS not_null,
    attribute.attgenerated <> ''                                          AS generated,
    EXISTS (
        SELECT FROM pg_index
        WHERE indrelid = class.oid AND indisunique AND indisvalid AND indpred IS NULL AND indexprs IS NULL
          AND (SELECT array_agg(attname::text ORDER BY attname::text COLLATE "C")
               FROM pg_attribute WHERE attrelid = class.oid AND attnum = ANY ((indkey::smallint[])[0:indnkeyatts - 1]))
            = (SELECT array_agg(name ORDER BY name COLLATE "C") FROM unnest(%(keys)s::text[]) AS name)
    )                                                                     AS key_is_unique
FROM pg_class AS class
LEFT JOIN pg_attribute AS attribute
  ON attribute.attrelid = class.oid AND attribute.attname = %(column)s AND attribute.attnum > 0 AND NOT attisdropped
LEFT JOIN pg_type AS type ON type.oid = attribute.atttypid
WHERE class.oid = to_regclass(%(table)s)
