-- What people did with items: the user's table or query, only ever read.
-- {relation}: that; {user}: its column; {key}: the item key as an expression; {weight}, {at}: expressions, or constants.


-- name: of_user
-- A person's interactions, newest first. {asked}: who, of the column's type; {most}: how many.

SELECT {key}, {weight}, {at}
FROM {relation} AS source
WHERE {user} = {asked} AND {key} IS NOT NULL
ORDER BY 3 DESC NULLS LAST, 1
LIMIT {most}


-- name: liked
-- Who liked what, each once, in no order.

SELECT DISTINCT {user}::text, {key}
FROM {relation} AS source
WHERE {weight} > 0 AND {user} IS NOT NULL AND {key} IS NOT NULL
