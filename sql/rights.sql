-- Who may do what with the tables and views that the pipeline keeps of a model.


-- name: relations
-- Owner, grants and row-level security of tables and views, and the options of a view, in the order of their names; of
-- one that is not there yet, what it gets when this role makes it. A policy names its own table by the character 1.
-- Parameter: relations.

SELECT
    coalesce(pg_get_userbyid(class.relowner), current_user)::text,
    (
        SELECT coalesce(jsonb_agg(DISTINCT jsonb_build_array(
            CASE entry.grantee WHEN 0 THEN '' ELSE pg_get_userbyid(entry.grantee) END,
            entry.privilege_type, granted.column_name, entry.is_grantable)), '[]')
        FROM (
            SELECT coalesce(class.relacl, acldefault('r', class.relowner)) AS list, '' AS column_name
            WHERE class.oid IS NOT NULL
            UNION ALL
            SELECT attacl, attname FROM pg_attribute
            WHERE attrelid = class.oid AND attnum > 0 AND NOT attisdropped AND attacl IS NOT NULL
            UNION ALL
            SELECT coalesce((SELECT defaclacl FROM pg_default_acl
                             WHERE defaclrole = me.oid AND defaclnamespace = 0 AND defaclobjtype = 'r'),
                            acldefault('r', me.oid)), ''
            WHERE class.oid IS NULL
            UNION ALL
            SELECT defaclacl, '' FROM pg_default_acl
            WHERE class.oid IS NULL AND defaclrole = me.oid AND defaclnamespace = to_regnamespace('embeddings')
              AND defaclobjtype = 'r'
        ) AS granted, aclexplode(granted.list) AS entry
    ),
    coalesce(class.relrowsecurity, false),
    coalesce(class.relforcerowsecurity, false),
    (
        SELECT coalesce(jsonb_agg(jsonb_build_array(
            polname, polpermissive, polcmd,
            (SELECT jsonb_agg(CASE role WHEN 0 THEN '' ELSE pg_get_userbyid(role) END ORDER BY role)
             FROM unnest(polroles) AS role),
            replace(pg_get_expr(polqual, polrelid), quote_ident(class.relname) || '.', chr(1) || '.'),
            replace(pg_get_expr(polwithcheck, polrelid), quote_ident(class.relname) || '.', chr(1) || '.'))), '[]')
        FROM pg_policy WHERE polrelid = class.oid
    ),
    CASE WHEN class.relkind = 'v' THEN to_jsonb(coalesce(class.reloptions, '{}')) ELSE '[]' END
FROM unnest(%(relations)s::text[]) WITH ORDINALITY AS named (relation, number)
CROSS JOIN (SELECT oid FROM pg_roles WHERE rolname = current_user) AS me
LEFT JOIN pg_class AS class ON class.oid = to_regclass(named.relation)
ORDER BY named.number


-- name: column
-- The grants on one column by itself. Parameters: table, column.

SELECT CASE entry.grantee WHEN 0 THEN '' ELSE pg_get_userbyid(entry.grantee) END, entry.privilege_type, entry.is_grantable
FROM pg_attribute, aclexplode(attacl) AS entry
WHERE attrelid = to_regclass(%(table)s) AND attname = %(column)s AND NOT attisdropped


-- name: owners
-- Tables and views, whose they are, and whether this role may change them, give another one to the same owner, and see
-- every row. Parameter: relations.

SELECT
    class.oid::regclass::text,
    pg_get_userbyid(class.relowner)::text,
    current_user::text,
    pg_has_role(class.relowner, 'USAGE'),
    pg_get_userbyid(class.relowner) = current_user OR me.rolsuper
        OR pg_has_role(class.relowner, CASE WHEN current_setting('server_version_num')::int < 160000 THEN 'MEMBER' ELSE 'SET' END),
    me.rolsuper OR has_schema_privilege(class.relowner, 'embeddings', 'CREATE'),
    NOT row_security_active(class.oid)
FROM unnest(%(relations)s::text[]) WITH ORDINALITY AS named (relation, number)
JOIN pg_class AS class ON class.oid = to_regclass(named.relation)
JOIN pg_roles AS me ON me.rolname = current_user
ORDER BY named.number
