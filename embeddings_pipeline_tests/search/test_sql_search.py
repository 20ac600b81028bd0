from embeddings_pipeline_tests.search.test_words import typed, with_words, without_files
from embeddings_pipeline_tests.support.workbench import execute
from embeddings_pipeline.search.query import search, encode_query, _runnable
from embeddings_pipeline.store.models import current_model
from pgvector import Vector

def test_first(database, settings, typed):
    with database.connect(autocommit=True) as c:
        model=current_model(c, typed)
        v=encode_query(typed, settings, model, model.profile, "Gundam records")
        rows=c.execute("select * from embeddings.hybrid_search('films', %s::vector, %s, %s, 4)", [Vector(v).to_text(), model.destination.fingerprint, "Gundam records"]).fetchall()
    hits=search(typed, without_files(settings), "Gundam records", k=4)
    for r in rows: print(r)
    for h in hits: print(h)
    assert [(r[0],r[1]) for r in rows]==[(h.item_key,h.score) for h in hits]
