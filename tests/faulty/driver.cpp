// SPDX-License-Identifier: Apache-2.0
// In the place of NVIDIA's driver, which the loader of the CUDA backend looks for and asks nothing.
