"""Language models at test time: sampling, decoding, watermarks, search, compression."""
