# ds_add_plugin(name SOURCES file... [LIBS target...] [CHECK level])
#
# A plugin as <name>.so: C++20, one exported symbol, hardened, nothing undefined. With CHECK a test
# "<name>_check" runs ds-plugin-check up to that level (1 contract, 2 numerics, 3 hostile) on it.

function(ds_add_plugin name)
  cmake_parse_arguments(P "" "CHECK" "SOURCES;LIBS" ${ARGN})
  if(P_UNPARSED_ARGUMENTS OR NOT P_SOURCES)
    message(FATAL_ERROR "ds_add_plugin(${name} SOURCES file... [LIBS target...] [CHECK level]): "
                        "${P_UNPARSED_ARGUMENTS}")
  endif()
  set(map ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/plugin.map)
  add_library(${name} MODULE ${P_SOURCES})
  set_target_properties(${name} PROPERTIES
    PREFIX "" SUFFIX .so CXX_STANDARD 20 CXX_STANDARD_REQUIRED ON C_STANDARD 11
    POSITION_INDEPENDENT_CODE ON C_VISIBILITY_PRESET hidden CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON LINK_DEPENDS ${map}
    # No RUNPATH, whatever the project asks for: a host refuses a file that brings its own search path.
    SKIP_BUILD_RPATH ON INSTALL_RPATH "" INSTALL_RPATH_USE_LINK_PATH OFF)
  target_link_libraries(${name} PRIVATE Driftstone::SDK ${P_LIBS})
  target_compile_options(${name} PRIVATE -fstack-protector-strong
    # A unique symbol would be shared between the generations of a reloaded plugin.
    $<$<CXX_COMPILER_ID:GNU>:-fno-gnu-unique>)
  target_link_options(${name} PRIVATE
    -Wl,--version-script=${map} -Wl,--exclude-libs,ALL -Wl,-z,now,-z,relro,-z,noexecstack)
  if(NOT DS_SANITIZE AND NOT CMAKE_CXX_FLAGS MATCHES "-fsanitize" AND NOT CMAKE_C_FLAGS MATCHES "-fsanitize")
    target_link_options(${name} PRIVATE -Wl,-z,defs)  # a sanitizer's runtime comes from the host
  endif()
  if(P_CHECK AND NOT TARGET Driftstone::plugin_check)
    message(STATUS "${name}: no test ${name}_check, ds-plugin-check is not installed")
  elseif(P_CHECK)
    add_test(NAME ${name}_check
             COMMAND Driftstone::plugin_check --level ${P_CHECK} $<TARGET_FILE:${name}>)
    set_tests_properties(${name}_check PROPERTIES LABELS fast)
  endif()
endfunction()
