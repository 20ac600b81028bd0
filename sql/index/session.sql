-- What a build needs of its session. Without lock_timeout, which would leave an invalid index; with a deadline of its
-- own, whatever the role has. %(memory)s: kilobytes, and not less than the server gives anyway.

SELECT
    set_config('lock_timeout', '0', false),
    set_config('statement_timeout', %(milliseconds)s::text, false),
    set_config(
        'maintenance_work_mem',
        greatest(%(memory)s, (SELECT setting::bigint FROM pg_settings WHERE name = 'maintenance_work_mem'))::text,
        false
    )
