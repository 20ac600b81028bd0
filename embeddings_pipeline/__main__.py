from embeddings_pipeline.cli import main

main()
