"""How the bundled models, their tokenizer and their task were made."""
