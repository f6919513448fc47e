"""The same work by what people would use instead; nothing imports these programs, which need what they compare."""
