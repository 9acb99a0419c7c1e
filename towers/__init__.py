"""One tower per modality, fused into one embedding per product, trained with a contrastive loss."""
