SELECT item_key FROM {item} WHERE batch = %(batch)s ORDER BY item_key
