"""Chat messages and the items of OpenAI's Responses API: how they are read, and how one becomes the other."""
