-- Where the newest row stands, less an overlap; rows whose time is ahead of the source's clock do not count.

SELECT ({updated_at} - {overlap}::interval)::text
FROM {relation} AS source
WHERE {updated_at} <= {clock} AND isfinite({updated_at})
ORDER BY {updated_at} DESC
LIMIT 1
