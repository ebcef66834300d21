// SPDX-License-Identifier: Apache-2.0
// Empty: a library has to have a file, and this one is there for its precompiled headers.
