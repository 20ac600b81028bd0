-- The name that a model's column has now: its view follows it through every rename. Parameters: view, table.

SELECT DISTINCT attribute.attname
FROM pg_rewrite AS rule
JOIN pg_depend AS depends ON depends.classid = 'pg_rewrite'::regclass AND depends.objid = rule.oid
JOIN pg_attribute AS attribute
  ON attribute.attrelid = depends.refobjid AND attribute.attnum = depends.refobjsubid
JOIN pg_type AS type ON type.oid = attribute.atttypid
WHERE rule.ev_class = to_regclass(%(view)s) AND depends.refclassid = 'pg_class'::regclass
  AND depends.refobjid = to_regclass(%(table)s) AND type.typname IN ('vector', 'halfvec')
