-- What would go on following a column when it is renamed: views, rules, functions, generated columns, constraints,
-- publications, indexes of other kinds or on expressions. ANN indexes are renamed with it. Parameters: table, column, ours (views).

SELECT DISTINCT pg_describe_object(depends.classid, depends.objid, depends.objsubid)
FROM pg_attribute AS attribute
JOIN pg_depend AS depends
  ON depends.refclassid = 'pg_class'::regclass AND depends.refobjid = attribute.attrelid
 AND depends.refobjsubid = attribute.attnum
LEFT JOIN pg_rewrite AS rule ON depends.classid = 'pg_rewrite'::regclass AND rule.oid = depends.objid
LEFT JOIN pg_index AS index ON depends.classid = 'pg_class'::regclass AND index.indexrelid = depends.objid
LEFT JOIN pg_class AS named ON named.oid = index.indexrelid
LEFT JOIN pg_am AS method ON method.oid = named.relam
WHERE attribute.attrelid = to_regclass(%(table)s) AND attribute.attname = %(column)s
  AND NOT coalesce(rule.ev_class IN (SELECT to_regclass(name) FROM unnest(%(ours)s::text[]) AS name), false)
  AND NOT coalesce(method.amname IN ('hnsw', 'ivfflat') AND index.indexprs IS NULL
                   AND (index.indpred IS NULL
                        OR pg_get_expr(index.indpred, index.indrelid) = format('(%%I IS NOT NULL)', attname)), false)
ORDER BY 1
