-- What our sessions have, whatever the role, the database or the server is set to. Not sent as `options` while
-- connecting: connection poolers refuse those.


-- name: ours
-- pgvector is found in whatever schema it is installed.

SET TimeZone = 'UTC'; SET DateStyle = 'ISO'; SET IntervalStyle = 'postgres'; SET bytea_output = 'hex';
SET extra_float_digits = 1; SET default_transaction_isolation = 'read committed'; SET jit = off;
SET quote_all_identifiers = off;
SELECT set_config('search_path', concat_ws(', ', nullif(current_setting('search_path'), ''), quote_ident(nspname)), false)
FROM pg_extension JOIN pg_namespace ON pg_namespace.oid = extnamespace
WHERE extname = 'vector' AND nspname <> ALL (current_schemas(true))


-- name: limits
-- A session of ours lasts as long as it has to: no limit of time that the server's version knows ends it.

SELECT set_config(name, '0', false)
FROM unnest(ARRAY['statement_timeout', 'lock_timeout', 'transaction_timeout', 'idle_session_timeout',
                  'idle_in_transaction_session_timeout']) AS name
WHERE current_setting(name, true) IS NOT NULL


-- name: backend
-- Which process of the server answers. {application_name}: the one that the session has anyway; setting it makes a pooler
-- keep the process for us, if it is of those that do so for settings.

SET application_name = {application_name}; SELECT pg_backend_pid()


-- name: source
-- For one transaction that reads the user's table, and for no longer: a pooler may lend the session to another program.
-- Both reads of a row must give the same bytes. {lock_timeout}, {statement_timeout}: milliseconds, 0 for none;
-- {row_security}: off makes the server say that it would hide rows from us.

SELECT set_config(name, value, true)
FROM (VALUES
    ('client_encoding', 'UTF8'), ('TimeZone', 'UTC'), ('DateStyle', 'ISO'), ('IntervalStyle', 'postgres'),
    ('bytea_output', 'hex'), ('extra_float_digits', '1'), ('jit', 'off'), ('quote_all_identifiers', 'off'),
    ('row_security', {row_security}),
    ('lock_timeout', {lock_timeout}), ('statement_timeout', {statement_timeout}), ('transaction_timeout', '0'),
    ('idle_in_transaction_session_timeout', '0')) AS setting (name, value)
WHERE current_setting(name, true) IS NOT NULL
