"""The bundle format, without torch: numbers, bits, codecs, tables, paths, shards. What a reader in any language has."""
