backward_kernel = mask_gradient_kernel = None
