"""Layer spec, packed attention, log-probability head; one weight table per Hugging Face family."""
