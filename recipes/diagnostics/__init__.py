"""What a synthetic set lacks, where the gap sits, and a page of everything."""
