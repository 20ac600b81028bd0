"""LlamaIndex's ingestion pipeline into pgvector (docstore in memory): first load, nothing changed, 1 % changed."""

import time

from llama_index.core import Document
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.vector_stores.postgres import PGVectorStore
from peer_common import MODEL, arguments, one_percent_changed, postgres, rows, timed

args = arguments()
server, url = postgres(args.state)
store = PGVectorStore.from_params(
    connection_string=url,
    async_connection_string=url.replace("+psycopg", "+asyncpg"),
    table_name=f"peer{int(time.time())}",
    embed_dim=384,
)
pipeline = IngestionPipeline(
    transformations=[HuggingFaceEmbedding(model_name=MODEL, embed_batch_size=32)],
    docstore=SimpleDocumentStore(),
    vector_store=store,
    docstore_strategy=DocstoreStrategy.UPSERTS,
)


def sync(pairs):
    pipeline.run(documents=[Document(text=text, id_=key) for key, text in pairs])


pairs = rows(args.catalogue, args.rows)
with timed(f"llamaindex first load of {len(pairs)}"):
    sync(pairs)
with timed("llamaindex nothing changed"):
    sync(pairs)
with timed("llamaindex 1 % changed"):
    sync(one_percent_changed(pairs))
