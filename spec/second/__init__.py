"""The second implementation of the tallstore format, which writes the vectors.

It follows ``spec/tallstore-1.md``, with numpy, xxhash and the standard library. It must never import tallstore or
torch, or a mistake there would be made twice; bfloat16 is integer arithmetic here. It is written to be read, one small
function a concept, and not to be fast.

elements    tensors as bytes, casts, r13, packed fields
algebra     base, centre, side and scale to an expert
frames      zstd frames, by hand
shards      payloads, and the safetensors files that they lie in
bundles     a bundle from its tables to its sealed files
models      bases, groups and tasks, and what each task decodes to
content     pseudo-random numbers
valid       the valid vectors; valid_kinds and valid_centre: those of further kinds, and of a centre; valid_grown: of
            bundles that grew
kernels     the bundles that invalid vectors break
breaking    ways to break a bundle in one place
invalid     the invalid vectors; invalid_kinds: those of further kinds, and of a centre
"""
